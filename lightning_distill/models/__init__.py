"""Any model, from the outside: what it reads of a batch, how it is called, loaded, saved and told from another.

Here belongs what is true of one model alone, of transformers or not. What two models are to each other belongs into
``teachers/`` and ``students/``; what a forward leaves behind into ``signals/``; what a batch asks for into ``tasks/``.
"""
