"""The MCP tools: a class for each toolset, and a thin method for each tool, whose card is what the model reads."""
