"""Serves MCP clients: one on stdin and stdout, or many over HTTP."""
