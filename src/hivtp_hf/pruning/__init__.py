"""What every checkpoint needs, whatever its method and family. Imports nothing of ours from outside this folder."""
