"""What the method needs of transformers and PEFT: names, traces, the emulator, the adapter."""

import logging

# PEFT imports bitsandbytes, whose CPU kernels warn that they lack the package ``kernels``; no module here calls them.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())
