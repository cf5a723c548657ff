"""What replies are made of: results, pages, previews, excerpts of output, statistics."""
