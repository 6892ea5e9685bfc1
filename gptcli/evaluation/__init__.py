"""Numbers about a model: loss, perplexity, bits per byte."""
