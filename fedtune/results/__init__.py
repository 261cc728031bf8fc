"""Files that hold what a run has measured, as types: one line of rounds.jsonl, summary.json.

Whoever writes a file builds its type and calls `to_json`; readers call `from_json`, which refuses
what is no such file and makes None of every number that is missing, null, NaN or infinite.
"""
