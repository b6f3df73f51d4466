"""`hivtp serve` under clients of all kinds at once, for some seconds; `make soak-serve` has them for half an hour."""

from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf.checkpoints import convert_checkpoint
from image_host import image_host
from served import Reference, serving
from soak import OPTIONS, Soak


def test_clients_of_all_kinds_at_once(tmp_path):
    model = convert_checkpoint(str(CHECKPOINT), tmp_path / "shapes", {"retention_ratio": 2 / 9})
    with image_host() as host, serving(tmp_path, model, *OPTIONS) as server:
        soak = Soak(server, model, Reference.of(model), host, questions=3)
        # On a busy machine a pool of threads may get its last one after the warm-up. What leaks grows each time.
        for seed in range(3):
            report = soak.run(seconds=8, clients=8, seed=seed)
            if report.threads_at_rest[1] <= report.threads_at_rest[0]:
                break
    assert report.faults(memory=False) == []
    assert set(report.outcomes) >= {"good", "slow", "broken", "abandoned"}
    assert "Traceback" not in server.log.read_text()
