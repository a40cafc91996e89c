"""Images made of Dockerfiles that records of instances bring.

Invariant: a Dockerfile is built only for a caller who says so. Building runs its commands with the network
and with the rights of the Docker daemon: no sandbox of ours is around them.
"""

from __future__ import annotations

import asyncio
import io

from agentgym.environments.code.repair_instances import Instance
from agentgym.errors import EnvironmentFailed, MissingDependency, UsageError

SECONDS = 3_600.0
"""Deadline of building one image."""


async def build(instance: Instance, *, allowed: bool) -> None:
    """Build the image of an instance from its Dockerfile, unless the daemon has an image of that name.

    Raises:
        UsageError: The caller did not allow it, or the instance has no Dockerfile.
        MissingDependency: The package docker is not installed.
        EnvironmentFailed: It cannot be built.
    """
    if not allowed:
        raise UsageError(
            f"the record of {instance.id} brings a Dockerfile, which is somebody's program",
            hint="leave the Dockerfile out where its image exists; or say build_dockerfiles=True where you "
            "trust it",
        )
    if instance.image is None or not instance.dockerfile:
        raise UsageError(f"{instance.id} has no Dockerfile")
    try:
        await asyncio.wait_for(asyncio.to_thread(_build, instance.image, instance.dockerfile), SECONDS)
    except TimeoutError as error:
        raise EnvironmentFailed(f"the image {instance.image} was not built within {SECONDS:g} s") from error


def _build(image: str, dockerfile: str) -> None:
    try:
        import docker
        from docker.errors import APIError, BuildError, DockerException, ImageNotFound
    except ImportError as error:
        raise MissingDependency("docker", "docker") from error
    try:
        client = docker.from_env()
        try:
            client.images.get(image)
        except ImageNotFound:
            client.images.build(fileobj=io.BytesIO(dockerfile.encode()), tag=image, rm=True)
        finally:
            client.close()
    except (BuildError, APIError, DockerException) as error:
        raise EnvironmentFailed(
            f"the image {image} cannot be built: {error}", hint="see that the Docker daemon runs"
        ) from error
