#!/bin/bash
# Build chisel without a Go module proxy: from clones of six repositories, and the Go libraries of Debian 12.
#
#     build_chisel.sh FOLDER
#
# FOLDER holds clones of chisel, requestlog (with its tag v1.0.0), sizestr, ansi, go-termutil and realip. The program is
# FOLDER/chisel-build/chisel: put it on PATH, or name it in PROGRAMS, for `make bench`. The packages:
#
#     apt-get install golang-go golang-github-{armon-go-socks5,fsnotify-fsnotify,gorilla-websocket,jpillora-backoff}-dev \
#         golang-golang-x-{crypto,net,sync}-dev
set -eu
folder=$(cd "$1" && pwd)
build=$folder/chisel-build
source=$build/src/github.com
rm -rf "$build"
copy() { mkdir -p "$source/$2" && git -C "$folder/$1" archive "${3:-HEAD}" | tar -x -C "$source/$2"; }
copy chisel jpillora/chisel
copy requestlog jpillora/requestlog v1.0.0
copy sizestr jpillora/sizestr
copy ansi jpillora/ansi
copy go-termutil andrew-d/go-termutil
copy realip tomasen/realip
cd "$source/jpillora/chisel"
GO111MODULE=off GOPATH=$build:/usr/share/gocode go build -o "$build/chisel" .
echo "built $build/chisel"
