"""A study of pruned language models that runs in minutes on a CPU: `dwm-fast language`."""
