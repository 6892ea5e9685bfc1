"""From sources to rows: documents, tokenizer, verified shards of tokens, and the order in which they are trained on."""
