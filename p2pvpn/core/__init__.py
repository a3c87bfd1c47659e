"""Value types, errors, wire cursors, timers and limits that everything else stands on; imports nothing of ours."""
