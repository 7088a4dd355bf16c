"""TensorRT engines from the graphs of a bundle: `lower` and `merge` rewrite graphs, `build` compiles them."""
