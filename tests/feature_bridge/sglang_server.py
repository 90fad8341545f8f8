"""SGLang's real HTTP server on a CPU: python sglang_server.py MODEL_DIR PORT. In a process of its own."""

import sys

from feature_bridge import cpu_stand_ins
from feature_bridge.targets import sglang_versions

# At the top level, for the processes that the server spawns import this file too.
sglang_versions.set_environment("cpu")
cpu_stand_ins.install_before_sglang()


def main(directory: str, port: int) -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    cpu_stand_ins.use_in_sglang()
    launch_server(
        ServerArgs(
            model_path=directory,
            host="127.0.0.1",
            port=port,
            device="cpu",
            dtype="float32",
            attention_backend="torch_native",
            sampling_backend="pytorch",
            grammar_backend="none",
            context_length=512,
            max_total_tokens=4096,
            max_running_requests=4,
            mem_fraction_static=0.3,
            disable_cuda_graph=True,
            disable_radix_cache=True,
            disable_overlap_schedule=True,
            skip_server_warmup=True,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
