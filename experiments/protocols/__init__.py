"""Published protocols of model merging, each as a table of data and one runner.

``python -m experiments.protocols NAME --models FILE.yaml`` runs one where checkpoints are given,
``--zoo`` on the small models of this repository. A protocol (:mod:`.table`) says which methods are
compared with which settings, and what is reported; the file (:mod:`.models_file`) names base,
experts, items and what scores what. Merges are planned, prepared and scored by the product
(:mod:`.merges`), one process for each method (:mod:`.running`), and every finished merge is kept.
"""
