"""Runs the digits demo once undisturbed and twice with stops by SIGKILL, each followed by ``--resume``.

    python tests/killed.py FOLDER

stops at 20 random events of the run, among them every part of a save, and then from outside, at random
moments. Every attempt is a fork of this process, so that the imports are paid for once. Prints the stops; the
files of the runs are in FOLDER/peace, FOLDER/events and FOLDER/moments.
"""

import io
import json
import os
import pathlib
import random
import signal
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import digits_flexmatch

STOPS, MOST_MOMENTS = 20, 40
# Not a multiple of the iterations between saves: the save at the end has a label of its own.
ARGUMENTS = "--iterations 31 --seeds 0 --save-every 2 --resume --out"


def fork(run):
    """Fork a child that calls ``run`` and nothing else; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        run()
        code = 0
    finally:
        os._exit(code)


def ended(child):
    """How the child ended: None, or the signal."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "an attempt failed, see above"
    return None


def demo(folder):
    """The demo, in this process. Its verdict on so short a run does not matter here."""
    digits_flexmatch.main([*ARGUMENTS.split(), str(folder)])


def watch(event):
    """Call ``event(label)`` at every step of the run and of its saves; labels are (method, iteration, kind)."""
    place = ["", 0]

    def before(owner, name, kind, also=lambda *arguments: None):
        original = getattr(owner, name)

        def watched(*arguments):
            event((*place, kind), *arguments)
            result = original(*arguments)
            also(*arguments)
            return result

        setattr(owner, name, watched)

    train = digits_flexmatch.Run.train

    def watched_train(self):
        place[:] = self.method, len(self.history.losses)
        for iteration in train(self):
            place[:] = self.method, iteration
            event((*place, "step"))
            yield iteration

    digits_flexmatch.Run.train = watched_train
    before(digits_flexmatch.EMATeacher, "update", "between optimizer and teacher")
    before(torch, "save", "write")
    before(os, "fsync", "fsync")
    before(os, "replace", "replace", also=lambda *arguments: event((*place, "replaced")))


def killing(stop):
    """An event that ends the process at the label ``stop``; a write ends with half of its bytes written."""
    save = torch.save

    def event(label, *arguments):
        if label == stop:
            if label[2] == "write":
                state, file = arguments
                whole = io.BytesIO()
                save(state, whole)
                file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    return event


def in_peace(folder):
    """Run once undisturbed; return the labels of all events in their order, each once."""
    log = folder / "events.json"

    def run():
        labels = {}
        watch(lambda label, *arguments: labels.setdefault(label))
        demo(folder / "peace")
        log.write_text(json.dumps(list(labels)))

    assert ended(fork(run)) is None
    return [tuple(label) for label in json.loads(log.read_text())]


def by_events(folder, labels):
    """Stop at 20 of the labels, in their order; return them."""
    numbers = random.Random(1)
    stops = [labels[k] for k in sorted(numbers.sample(range(len(labels)), STOPS))]
    for stop in stops:

        def run(stop=stop):
            watch(killing(stop))
            demo(folder)

        assert ended(fork(run)) == signal.SIGKILL, f"did not come to {stop}"
    return stops


def by_moments(folder, duration):
    """Stop at random moments until the run ends by itself; return after how many seconds each."""
    stops = []
    while len(stops) < MOST_MOMENTS:
        child = fork(lambda: demo(folder))
        # The first is early: this run may be much faster than the one that was timed.
        seconds = random.uniform(0, duration / (2 if stops else 8))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        if ended(child) is None:
            break
        stops.append(seconds)
    return stops


def main(folder):
    """The stops, as JSON."""
    torch.set_num_threads(1)  # before anything starts threads, which a fork would lose
    digits_flexmatch.Run("FlexMatch", 0, digits_flexmatch.Config())  # what is imported late is imported here
    folder = pathlib.Path(folder)
    start = time.perf_counter()
    labels = in_peace(folder)
    duration = time.perf_counter() - start
    stops = {
        "events": by_events(folder / "events", labels),
        "moments": by_moments(folder / "moments", duration),
    }
    for how in stops:
        assert ended(fork(lambda how=how: demo(folder / how))) is None
    print(json.dumps(stops))


if __name__ == "__main__":
    main(sys.argv[1])
