"""Values: task specs, outcomes, statistics and errors. Imports no other package of rhapsody-mcp."""
