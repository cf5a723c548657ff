"""Prompts, sent to OpenAI-compatible servers: what every inference backend shares."""
