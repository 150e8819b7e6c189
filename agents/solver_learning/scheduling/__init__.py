"""Parts of schedule learning: levels as parameters, gradients by them, programmes, both stages."""
