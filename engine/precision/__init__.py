"""In which arithmetic a layer's products are computed."""
