"""Neural tangent kernels, of arrays and of datasets."""
