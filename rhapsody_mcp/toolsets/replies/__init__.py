"""The parts of replies: rows, results, pages, previews, excerpts of output, failures, statistics."""
