"""Which scenes are for what. A scene's seed begins with the number of its split, so splits never meet."""

TRAINING, VALIDATION, TEST, PRACTICE, CALIBRATION, CONFIRMATION = range(6)
