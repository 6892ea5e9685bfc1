"""The recipe and nothing else: its schema, how it is read, and the recipes that ship."""
