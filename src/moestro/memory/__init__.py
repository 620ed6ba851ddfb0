"""Where bytes live and how they get there: budget, buffers, arena, transfers, the cache of planes."""
