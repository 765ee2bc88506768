"""Any model, from the outside: what it reads of a batch, how it is called, loaded, saved and told from another.

Here belongs what is true of a model, of transformers or not, and by what two are told apart (classes, tokenizers,
weights). What a forward leaves behind belongs into ``signals/``; what a batch asks for into ``tasks/``; what a student
and its teacher are to each other into ``step/pairing.py``.
"""
