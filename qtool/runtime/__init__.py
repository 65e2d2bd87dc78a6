"""Running a checkpoint as it is: weights stay packed in memory and native products read them.

`load` gives the model as a transformers module; `Decoder` runs Llama-like families with few native ops per token.
"""
