"""Which scenes are for what. A scene's seed begins with the number of its split, so splits never meet."""

TRAINING, VALIDATION, TEST, PRACTICE, CALIBRATION = range(5)
