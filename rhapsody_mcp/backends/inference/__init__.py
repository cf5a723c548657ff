"""Sends prompts to OpenAI-compatible servers, for the vLLM and the endpoint backend."""
