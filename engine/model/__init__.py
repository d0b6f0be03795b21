"""What the model is, uncut: a decoder-only transformer of the Llama family.  How it is cut: `engine.parallel`."""
