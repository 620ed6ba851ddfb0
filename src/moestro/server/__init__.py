"""An HTTP server over `moestro.engine.service`, which speaks the OpenAI protocol; a web page; a list of servers."""
