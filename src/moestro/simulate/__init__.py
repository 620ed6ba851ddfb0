"""Replay of recorded routing: the same policies as at run time, against memory sizes, links and Belady's oracle."""
