"""Fine-tunes of a store's base: how they become variants, and which one a prompt is for."""
