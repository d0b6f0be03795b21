"""Making tokenizers: training, vocabulary expansion, Hugging Face export, and the proof that both cut alike."""
