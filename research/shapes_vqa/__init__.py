"""How the model of examples/shapes_vqa was trained, and why runs on its questions come out as they do."""
