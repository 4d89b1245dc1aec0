# A server for one model; `docker run -v …/token.txt:/token:ro` gives it the token that it needs to be reached.
FROM python:3.12-slim

# A C compiler, for the kernels; any version does.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '/src[serve]' \
    && rm -r /src

RUN useradd --create-home --uid 10001 switchrun && install -d -o switchrun /data
USER 10001
# hadolint ignore=DL3064
ENV SWITCHRUN_OFFLOAD_FOLDER=/data/offload HF_HOME=/data/huggingface SWITCHRUN_TOKEN_FILE=/token
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["switchrun", "serve", "--host", "0.0.0.0"]
