# Windtunnel with its training stack, for NVIDIA GPUs: docker run --gpus all --volume "$PWD:/data" ...
# torch brings CUDA itself; the image adds what its kernels are compiled with at the first launch.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# python3-dev has Python.h, which triton needs beside a C compiler.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN python3 -m venv /opt/windtunnel \
 && /opt/windtunnel/bin/pip install --no-cache-dir --constraint /src/constraints.txt '/src[train]' \
 && rm -rf /src

# Runs, models and rows lie in what is mounted; the user's number is that of most first users.
RUN useradd --create-home --non-unique --uid 1000 pilot \
 && mkdir /data \
 && chown pilot /data
USER pilot
ENV PATH=/opt/windtunnel/bin:$PATH WINDTUNNEL_RUNS=/data HF_HOME=/data/.huggingface
WORKDIR /data
VOLUME /data
ENTRYPOINT ["windtunnel"]
