"""Other programs that run their tasks in a session, a module each."""

from rhapsody_mcp.integrations.asyncflow import AsyncFlowBackend

__all__ = ["AsyncFlowBackend"]
