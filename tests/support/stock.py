"""Servers and a client of released petals, on the packages it was released with: nothing of this program is imported.

``stock.py serve``: the tasks are servers, each of which runs in a process forked from this one.
``stock.py ask``: the tasks are generations, whose tokens are printed, or trainings, whose losses and gradients are.
``stock.py measure``: the tasks are a list of loads, line after line, whose times are printed.
Tasks and results are a line of JSON on standard input and output.
"""

import concurrent.futures
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import hivemind
import hivemind.compression
import hivemind.p2p
import hivemind.utils.asyncio
import hivemind.utils.nested
import hivemind.utils.tensor_descr
import hivemind.utils.timed_storage
import torch

# Top-level names that petals 2.2.0 imports and hivemind 1.1.12, the first with a wheel for today's Python, lacks.
HOMES = {
    hivemind.p2p: ("P2P", "P2PContext", "PeerID"),
    hivemind.compression: ("deserialize_tensor_stream", "deserialize_torch_tensor", "serialize_torch_tensor"),
    hivemind.utils: ("MSGPackSerializer", "get_logger"),
    hivemind.utils.nested: ("nested_compare", "nested_flatten", "nested_pack"),
    hivemind.utils.asyncio: ("anext",),
    hivemind.utils.tensor_descr: ("BatchTensorDescriptor", "TensorDescriptor"),
    hivemind.utils.timed_storage: ("MAX_DHT_TIME_DISCREPANCY_SECONDS", "TimedStorage", "get_dht_time"),
}
for home, names in HOMES.items():
    for name in names:
        if not hasattr(hivemind, name):
            setattr(hivemind, name, getattr(home, name))


def serve(model: str, **options: Any) -> None:
    """Run one server.

    :param options: of petals' ``Server``
    """
    from petals.server.server import Server

    options.setdefault("host_maddrs", ["/ip4/127.0.0.1/tcp/0"])
    Server(
        converted_model_name_or_path=model,
        throughput=1.0,  # else it is measured
        num_handlers=1,
        torch_dtype="float32",
        device="cpu",
        quant_type=None,
        reachable_via_relay=False,  # else others are asked
        use_relay=False,
        use_auto_relay=False,
        **options,
    ).run()


def make_client(model: str, **options: Any) -> Any:
    """Return petals' model, both ends of it.

    :param options: of petals' client configuration
    """
    from petals import AutoDistributedModelForCausalLM

    # Without `use_chunked_forward`, petals asks a package that has no wheels for Python 3.12 about the processor.
    return AutoDistributedModelForCausalLM.from_pretrained(
        model, torch_dtype=torch.float32, use_chunked_forward=False, show_route=False, **options
    )


def each_chain(client: Any, chains: list[list[str]]) -> Iterator[None]:
    """Let the client use one chain of servers after the other, given as the ids of their peers."""
    manager = client.transformer.h.sequence_manager
    for chain in chains:
        manager.allowed_servers = set(map(hivemind.p2p.PeerID.from_base58, chain))
        manager.update(wait=False)  # whoever looks for servers next waits for it
        yield


def generate(
    model: str, prompts: list[list[int]], chains: list[list[str]], ways: list[dict[str, Any]], **options: Any
) -> list[list[list[list[int]]]]:
    """Return the next tokens of each prompt, by each chain of servers in each way.

    :param ways: arguments of ``generate``
    """
    client = make_client(model, **options)
    texts: list[list[list[list[int]]]] = []
    for _ in each_chain(client, chains):
        texts.append([])
        for way in ways:
            outputs = [client.generate(torch.tensor([prompt]), do_sample=False, **way) for prompt in prompts]
            texts[-1].append([out[0, len(prompt) :].tolist() for prompt, out in zip(prompts, outputs, strict=True)])
    return texts


def tune(model: str, prompt: list[int], chains: list[list[str]], **options: Any) -> list[dict[str, list[float]]]:
    """Return the loss of deep prompts, random but the same for all, its gradients, and what is generated with them, by
    each chain of servers."""
    client = make_client(model, tuning_mode="deep_ptune", pre_seq_len=3, **options)
    deep = client.transformer.intermediate_prompt_embeddings.weight
    parameters = (client.transformer.prompt_embeddings.weight, deep)
    torch.manual_seed(0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.5)
    token_ids = torch.tensor([prompt])
    found = []
    for _ in each_chain(client, chains):
        loss = client(token_ids, labels=token_ids).loss
        gradients = torch.autograd.grad(loss, parameters)
        output = client.generate(token_ids, max_new_tokens=5, do_sample=False)
        found.append(
            {
                "loss": [loss.item()],
                "gradients": torch.cat([gradient.flatten() for gradient in gradients]).tolist(),
                "tokens": output[0].tolist(),
            }
        )
    return found


@torch.inference_mode()
def measure(client: Any, prompt: list[int], tokens: int) -> list[float]:
    """Return the seconds of each step of a session: of the prompt, and of each token after it."""
    from petals.client.inference_session import InferenceSession

    times, ids = [], prompt
    with InferenceSession(client.transformer.h.sequence_manager, len(prompt) + tokens) as session:
        for _ in range(1 + tokens):
            began = time.perf_counter()
            hidden = session.step(client.transformer.word_embeddings_layernorm(embed(client, ids)))
            logits = client.lm_head(client.transformer.ln_f(hidden[:, -1:]))
            ids = [int(logits[0, -1].argmax())]
            times.append(time.perf_counter() - began)
    return times


def embed(client: Any, ids: list[int]) -> torch.Tensor:
    return client.transformer.word_embeddings(torch.tensor([ids]))


def measure_lines(tasks: list[dict[str, Any]]) -> None:
    """Measure what each line asks for: sessions at a time, of so many tokens after a prompt."""
    client = make_client(**tasks[0])
    for line in sys.stdin:
        task = json.loads(line)
        with concurrent.futures.ThreadPoolExecutor(task["sessions"]) as pool:
            began = time.perf_counter()
            runs = [pool.submit(measure, client, task["prompt"], task["tokens"]) for _ in range(task["sessions"])]
            times = [run.result() for run in runs]
            print(json.dumps({"seconds": time.perf_counter() - began, "times": times}), flush=True)


ASKED: dict[str, Callable[..., Any]] = {"generate": generate, "tune": tune}


def main() -> None:
    import petals  # noqa: F401  before the processes fork, so that it is imported once

    torch.set_num_threads(1)
    tasks = json.loads(sys.stdin.readline())
    if sys.argv[1:] == ["ask"]:
        # Petals leaves some sessions open, and their finaliser waits for the event loop. The collector may call it on
        # the loop's own thread, which then waits for itself.
        gc.disable()
        print(json.dumps([ASKED[task.pop("what")](**task) for task in tasks]), flush=True)
        return
    if sys.argv[1:] == ["measure"]:
        gc.disable()
        measure_lines(tasks)
        return
    import petals.server.server  # noqa: F401

    servers = [multiprocessing.Process(target=serve, kwargs=task) for task in tasks]
    for server in servers:
        server.start()
    for server in servers:
        server.join()


if __name__ == "__main__":
    main()
