"""Data contracts: strict rows, flat facts about them, and expectations over the facts, one contract per kind of row.

`rows.read_rows` refuses what is not of its kind, `facts.facts` says what is so, `contract.judge` whether it may train.
Nothing here imports the rest of the project, and only `contract.judge` imports Great Expectations (about 5 s).
"""
