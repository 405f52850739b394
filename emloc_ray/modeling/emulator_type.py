"""The emulator's model type: its config, and its registration with transformers' Auto classes.

``import emloc_ray`` has both functions below called as soon as transformers' Auto modules are imported, or at once where
they are. The factorized model itself is imported only when an emulator is opened.
"""

import copy
from types import ModuleType
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.ranks import Storage

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM")


class EmulatorModelConfig(PreTrainedConfig):
    """``base_config``: the original's, as a dict; ``ranks`` by module name, without dense modules; ``storage``: of factors,
    ``factors`` or ``pivoted``; ``integers``: the fields of :class:`~emloc_ray.core.integers.IntegerForms`, where some linears
    are stored so."""

    model_type = "emloc_emulator"

    def __init__(
        self,
        base_config: dict[str, Any] | None = None,
        ranks: dict[str, int] | None = None,
        storage: Storage = "factors",
        integers: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.base_config = base_config or {}
        self.ranks = ranks or {}
        self.storage = storage
        self.integers = integers
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for other models; keywords that the original's config has change that one."""
        with_unused = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        original = config.original()
        changes = {key: kwargs[key] for key in kwargs if key != "name_or_path" and hasattr(original, key)}
        if changes:
            config.base_config = type(original).from_dict(original.to_dict(), **changes).to_dict()
        unused = {key: value for key, value in unused.items() if key not in changes}
        return (config, unused) if with_unused else config

    def forms(self) -> IntegerForms:
        """What is stored in integers."""
        return IntegerForms(**(self.integers or {}))

    def original(self) -> Any:
        """The original's config, as its own class."""
        from transformers import AutoConfig

        values = copy.deepcopy(self.base_config)
        return AutoConfig.for_model(values.pop("model_type"), **values)


def register_config(auto: ModuleType) -> None:
    """Makes ``AutoConfig`` read an emulator's config; ``auto`` is ``transformers.models.auto.configuration_auto``."""
    auto.AutoConfig.register(EmulatorModelConfig.model_type, EmulatorModelConfig, exist_ok=True)


def register_models(auto: ModuleType) -> None:
    """Makes the Auto classes open emulators; ``auto`` is ``transformers.models.auto.modeling_auto``."""
    for name in _AUTO_CLASSES:
        auto_class = getattr(auto, name)
        auto_class.register(EmulatorModelConfig, _model_class(auto_class), exist_ok=True)


def _model_class(auto: Any) -> type[Any]:
    """What an Auto class opens an emulator with."""

    def class_and_config(config: EmulatorModelConfig) -> tuple[Any, Any]:
        """The original's own class with factorized linears, and the config that it reads."""
        from emloc_ray.modeling.emulator import emulator_class

        original = config.original()
        base = auto._model_mapping[type(original)]
        base = base[0] if isinstance(base, tuple) else base
        if base.config_class is original.sub_configs.get("text_config"):  # a text model alone, as Auto classes do
            original = original.get_text_config()
        # The Auto class has put it into the config, which is not the one that the model reads.
        if config._attn_implementation is not None:
            original._attn_implementation = config._attn_implementation
        return emulator_class(base, config), original

    class EmulatorModel:
        config_class = EmulatorModelConfig

        @classmethod
        def _from_config(cls, config: Any, **kwargs: Any) -> Any:
            """Makes an untrained emulator, for an Auto class's ``from_config``."""
            emulator, original = class_and_config(config)
            return emulator._from_config(original, **kwargs)  # noqa: SLF001  what Auto classes call

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
            """Loads the emulator in ``path``; keywords as of the original's own class."""
            emulator, original = class_and_config(config)
            asked = [kwargs.pop(key) for key in ("dtype", "torch_dtype") if kwargs.get(key) is not None]
            kwargs["dtype"] = next((dtype for dtype in asked if dtype != "auto"), original.dtype or "auto")
            loaded = emulator.from_pretrained(path, *args, config=original, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # with ``output_loading_info``
            if getattr(model, "is_loaded_in_4bit", False):
                from emloc_ray.modeling.four_bit_linear import compute_exactly

                compute_exactly(model)
            return loaded

    EmulatorModel.__name__ = EmulatorModel.__qualname__ = auto.__name__.replace("AutoModel", "Emulator")
    return EmulatorModel
