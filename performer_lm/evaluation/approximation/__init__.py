"""Random features held against softmax.

pairs.py      queries and keys in pairs: the weights that features give them, and softmax's
layer.py      the errors of one layer's features
model.py      those of every layer of a model, on the vectors of a real forward
draws.py      those of more or fewer features, and of other draws
tables.py pictures.py   what was found, for people and for other programs
task.py       `evaluate.py task=approximation`, which does it all
"""
