"""The paper's experiments on a model at hand."""
