"""Parts of networks: backbones, heads, norms, memory."""
