"""Decoders as ONNX graphs, in the layout of onnxruntime-genai: what `qtool export --to onnx` writes.

builder: nodes and initializers, and the protobuf made of them.  weights: initializers made of what a checkpoint holds.
decoder: the nodes of a decoder.  genai: the files with which onnxruntime-genai loads the directory.
"""
