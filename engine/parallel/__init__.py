"""How the model is cut: tensor, context, pipeline and data parallelism."""
