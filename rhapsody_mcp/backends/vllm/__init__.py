"""The backend that starts vLLM servers and sends prompts to these servers."""
