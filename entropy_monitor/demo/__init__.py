"""The packaged demo: a byte-level GPT on text that every machine has, with hooks, watcher and dashboard together."""
