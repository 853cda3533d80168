"""The swarm: servers that hold a model's blocks, and the client that computes with them. Nothing here knows of HTTP."""

import os
import warnings
from pathlib import Path

from swarm.places import settle_home

# hivemind forks, and threads of a tokenizer do not survive that; it would say so on standard error with every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Transformers 4.34 calls a part of PyTorch that has a newer name by now; its users can do nothing about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.utils\.generic")
# The app's setting of that name; a server is told by an option, see swarm.server.__main__.
_cache_dir = os.environ.get("CACHE_DIR", "").strip()
settle_home(Path(_cache_dir) if _cache_dir and not _cache_dir.startswith("~") else None)
