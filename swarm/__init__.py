"""The swarm: servers that hold a model's blocks, and the client that computes with them. Nothing here knows of HTTP."""

import os
import warnings

# hivemind forks, and threads of a tokenizer do not survive that; it would say so on standard error with every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Transformers 4.34 calls a part of PyTorch that has a newer name by now; its users can do nothing about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.utils\.generic")
