"""The merged model: the corrected adapter folded into the original."""
