"""Settings that every test shares: few threads, no hub, no generator surprises."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("MERGESEARCH_CACHE", tempfile.mkdtemp(prefix="mergesearch-cache-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
