"""Asks servers over HTTP, moestro's or others that speak OpenAI's protocol: conversations, load."""
